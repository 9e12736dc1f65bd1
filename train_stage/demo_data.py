"""Fashion-MNIST as a user's own images would lie: webdataset tars and a folder. For muse-demo.

    python -m train_stage.demo_data output_dir=runs/demo/data [data=FOLDER]

70,000 real photographs of clothes, 28x28 grey, 10 classes (Zalando, MIT licence). Writes
OUTPUT_DIR/train/train-00000.tar … (png, cls, txt = class name) and
OUTPUT_DIR/test/<class>/<index>.png.
"""

import gzip
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from configs.load import load_command_config

PACKAGE = "dataset-fashion-mnist"  # Debian's and Ubuntu's name
INSTALLED = Path("usr/share/datasets/fashion-mnist")  # where it unpacks, below the root
FILES = [f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in ("images-idx3-ubyte",)]
FILES += [name.replace("images-idx3", "labels-idx1") for name in FILES]
CLASS_NAMES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle-boot".split(",")


@dataclass
class DemoDataConfig:
    """Options of train_stage.demo_data."""

    output_dir: str = MISSING
    """Where train/ and test/ are written, and the download in download/."""
    data: str | None = None
    """Folder with Fashion-MNIST's four .gz files; none: Debian's package, else torchvision's."""
    images_per_tar: int = 6_000
    """Training images in a tar."""


def main(argv: list[str] | None = None) -> int:
    """Finds or downloads Fashion-MNIST and writes it; returns the exit status."""
    config = load_command_config(DemoDataConfig, argv, __doc__ or "")
    output = Path(config.output_dir)
    try:
        source = find_fashion_mnist(config.data, output / "download")
        print(f"Fashion-MNIST from {source}")
        write_tars(*read_split(source, "train"), output / "train", config.images_per_tar)
        write_folder(*read_split(source, "t10k"), output / "test")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_fashion_mnist(data: str | None, download: Path) -> Path:
    """The folder with the four files: `data`, the installed package, or a download.

    Raises FileNotFoundError that says what was tried when there is none.
    """
    if data is not None:
        if missing := [name for name in FILES if not (Path(data) / name).is_file()]:
            raise FileNotFoundError(f"data={data} lacks {', '.join(missing)}")
        return Path(data)
    for folder in (Path("/") / INSTALLED, download / INSTALLED, download / "FashionMNIST/raw"):
        if all((folder / name).is_file() for name in FILES):
            return folder
    download.mkdir(parents=True, exist_ok=True)
    failures = []
    for fetch in (fetch_with_apt, fetch_with_torchvision):
        try:
            return fetch(download)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            failures.append(f"  {fetch.__name__}: {error}")
    tried = "\n".join(failures)
    raise FileNotFoundError(
        f"Fashion-MNIST could not be downloaded:\n{tried}\n"
        f"Get the files {', '.join(FILES)} yourself and give their folder: data=FOLDER"
    )


def fetch_with_apt(download: Path) -> Path:
    """Debian's package, unpacked below `download`; needs apt-get and dpkg-deb but no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError("no apt-get and dpkg-deb here")
    print(f"apt-get download {PACKAGE}", flush=True)
    fetch = ["apt-get", "-qq", "download", PACKAGE]
    if subprocess.run(fetch, cwd=download, capture_output=True).returncode != 0:
        # The package lists are missing (a fresh container) or old: fetch our own, without root.
        (download / "apt/lists/partial").mkdir(parents=True, exist_ok=True)
        (download / "apt/archives/partial").mkdir(parents=True, exist_ok=True)
        own = [f"Dir::State::lists={download.resolve()}/apt/lists"]
        own += [f"Dir::Cache={download.resolve()}/apt", "APT::Sandbox::User="]
        options = [word for option in own for word in ("-o", option)]
        for command in (["apt-get", *options, "-qq", "update"], ["apt-get", *options, *fetch[1:]]):
            done = subprocess.run(command, cwd=download, capture_output=True, text=True)
            if done.returncode != 0:
                raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
        shutil.rmtree(download / "apt")
    package = max(download.glob(f"{PACKAGE}_*.deb"), key=os.path.getmtime)
    subprocess.run(["dpkg-deb", "-x", package, download], check=True)
    return download / INSTALLED


def fetch_with_torchvision(download: Path) -> Path:
    """torchvision's own download, into `download`."""
    from torchvision.datasets import FashionMNIST  # type: ignore[import-untyped]

    FashionMNIST(str(download), download=True)
    return download / "FashionMNIST/raw"


def read_split(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and class ids (n,) uint8 of "train" or "t10k"."""
    images = gzip.decompress((source / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((source / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    class_ids = np.frombuffer(labels, np.uint8, offset=8)
    return np.frombuffer(images, np.uint8, offset=16).reshape(len(class_ids), 28, 28), class_ids


def write_tars(images: np.ndarray, class_ids: np.ndarray, folder: Path, per_tar: int) -> None:
    """Writes train-00000.tar … as webdataset samples: png, cls and txt."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(images), desc="write tars", unit=" images", disable=None)
    for index, start in enumerate(range(0, len(images), per_tar)):
        path = folder / f"train-{index:05d}.tar"
        temporary = path.with_suffix(".partial")
        with TarWriter(str(temporary), mtime=0) as tar:
            for row in range(start, min(start + per_tar, len(images))):
                name = CLASS_NAMES[class_ids[row]]
                sample = {"png": to_png(images[row]), "cls": int(class_ids[row]), "txt": name}
                tar.write({"__key__": f"{row:05d}", **sample})
                bar.update()
        temporary.rename(path)
    bar.close()


def write_folder(images: np.ndarray, class_ids: np.ndarray, folder: Path) -> None:
    """Writes <class id>-<class name>/<index>.png."""
    for class_id, name in enumerate(CLASS_NAMES):
        (folder / f"{class_id}-{name}").mkdir(parents=True, exist_ok=True)
    for row in tqdm(range(len(images)), desc="write folder", unit=" images", disable=None):
        class_id = int(class_ids[row])
        path = folder / f"{class_id}-{CLASS_NAMES[class_id]}" / f"{row:05d}.png"
        path.write_bytes(to_png(images[row]))


def to_png(image: np.ndarray) -> bytes:
    """A grey image (H, W) uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
