"""Stage two: token store -> transformer -> pictures. Steps 5 to 9 of README's table.

loading -> conditioning -> objective -> models (muse-train); sampling -> pictures.py (muse-generate,
muse-evaluate). Pixels appear only in pictures.py.
"""
