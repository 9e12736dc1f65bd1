"""Step 2 in many threads: the memory of one large image, and no threads beside them."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.views import Decoder

TASKS, STATUS = Path("/proc/self/task"), Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="reads Linux's /proc")


@pytest.fixture
def four_threads_an_operation() -> Iterator[None]:
    """What torch does by itself on a machine of many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads_an_operation")
def test_a_thread_that_decodes_starts_no_others() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 420, 3), np.uint8)
    decoder = Decoder(PreprocessingConfig(views=["centre", "centre_flip", "random"]), [256, 300])
    tasks = []

    def work(kind: str, image: Image.Image) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        tasks.append(len(os.listdir(TASKS)))
        decoder.decode(buffer.getvalue(), "0" * 64)
        tasks.append(len(os.listdir(TASKS)))

    for kind in ("JPEG", "PNG"):
        for pixels in (noise, noise.swapaxes(0, 1)):
            thread = Thread(target=work, args=(kind, Image.fromarray(pixels)))
            thread.start()
            thread.join()
    assert tasks == tasks[:1] * 8


FOUR_LARGE = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.views import Decoder

def peak():
    return int(Path("{STATUS}").read_text().split("VmHWM:")[1].split()[0]) / 1024

data = Path(sys.argv[1]).read_bytes()
decode = Decoder(PreprocessingConfig(), [64], phash=True).decode
before = peak()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(decode, [data] * 4, ["0" * 64] * 4))
print(peak() - before)
"""


def test_large_images_take_the_memory_of_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "large.png"
    Image.new("RGB", (4200, 4200), "navy").save(path, exif=exif, compress_level=1)
    command = [sys.executable, "-c", FOUR_LARGE, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 300  # megabytes: Pillow's 71 twice, while it is turned; 53 as RGB
