"""Stage two: token store -> transformer -> pictures. Steps 5 to 9 of README's table.

loader.py -> masking.py -> transformer.py + loss.py (muse-train); sampling.py -> pictures.py
(muse-generate, muse-evaluate). Pixels appear only in pictures.py.
"""
