"""Fashion-MNIST as a user's own images would lie: webdataset tars and a folder. For muse-demo.

    python -m train_stage.demos.demo_data output_dir=runs/demo/data [data=FOLDER]

70,000 real photographs of clothes, 28x28 grey, 10 classes (Zalando, MIT licence). Writes
OUTPUT_DIR/train/train-00000.tar … (png, cls, txt = class name) and
OUTPUT_DIR/test/<class>/<index>.png.
"""

import gzip
import io
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from PIL import Image
from torchvision.datasets import FashionMNIST  # type: ignore[import-untyped]
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
    """Options of train_stage.demos.demo_data."""

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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_fashion_mnist(data: str | None, download: Path) -> Path:
    """The folder with the four files, all whole: `data`, the installed package, or a download.

    Raises ValueError or FileNotFoundError for a bad `data`, FileNotFoundError that says what was
    tried when there is none.
    """
    if data is not None:
        check_files(Path(data))
        return Path(data)
    fetched = [download / name / inner for name, (_, inner) in FETCHED.items()]
    for folder in (Path("/") / INSTALLED, *fetched):
        try:
            check_files(folder)
            return folder
        except (ValueError, FileNotFoundError) as error:
            if folder.exists():
                print(f"not used: {error}")
    tried = []
    for name in FETCHED:
        try:
            return fetch(name, download)
        except (ValueError, OSError, RuntimeError) as error:
            tried.append(f"  {name}: {error}")
    reasons = "\n".join(tried)
    raise FileNotFoundError(
        f"Fashion-MNIST could not be downloaded:\n{reasons}\n"
        f"Get the files {', '.join(FILES)} yourself and give their folder: data=FOLDER"
    )


def fetch(name: str, download: Path) -> Path:
    """Fills download/NAME, which appears by one rename and whole; returns where the files are."""
    fill, inner = FETCHED[name]
    partial, folder = download / f"{name}.partial", download / name
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    check_files(partial / inner)
    partial.rename(folder)
    return folder / inner


def fetch_with_apt(folder: Path) -> None:
    """Debian's package, unpacked into `folder`; needs apt-get and dpkg-deb but no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError("no apt-get and dpkg-deb here")
    print(f"apt-get download {PACKAGE}", flush=True)
    try:
        run(["apt-get", "-qq", "download", PACKAGE], folder)
    except OSError:
        # The package lists are missing (a fresh container) or old: fetch our own, without root.
        own = folder.resolve() / "apt"
        for name in ("lists", "archives"):
            (own / name / "partial").mkdir(parents=True)
        settings = [f"Dir::State::lists={own}/lists", f"Dir::Cache={own}", "APT::Sandbox::User="]
        apt_get = ["apt-get", *(word for setting in settings for word in ("-o", setting)), "-qq"]
        run([*apt_get, "update"], folder)
        run([*apt_get, "download", PACKAGE], folder)
        shutil.rmtree(own)
    (package,) = folder.glob(f"{PACKAGE}_*.deb")
    run(["dpkg-deb", "-x", package.name, "."], folder)


def fetch_with_torchvision(folder: Path) -> None:
    """torchvision's own download, into `folder`."""
    FashionMNIST(str(folder), download=True)


# name of the folder below download/: what fills it, and where the four files are in it
FETCHED = {
    "debian": (fetch_with_apt, INSTALLED),
    "torchvision": (fetch_with_torchvision, Path("FashionMNIST/raw")),
}


def run(command: list[str], folder: Path) -> None:
    """Runs a command in `folder`; raises OSError with its last words when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def check_files(folder: Path) -> None:
    """Reads the four files. FileNotFoundError names missing ones, ValueError a damaged one."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    for part in ("train", "t10k"):
        read_split(folder, part)


def read_split(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and class ids (n,) uint8 of "train" or "t10k"."""
    images = read_idx(source / f"{part}-images-idx3-ubyte.gz")
    class_ids = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
    if images.shape != (len(class_ids), 28, 28) or class_ids.max(initial=0) >= len(CLASS_NAMES):
        raise ValueError(
            f"{source}: {part} has images {images.shape} for {len(class_ids)} class ids up to "
            f"{class_ids.max(initial=0)}, not (n, 28, 28) for n up to {len(CLASS_NAMES) - 1}"
        )
    return images, class_ids


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file: 0, 0, 8, dimensions; sizes; values.

    Raises ValueError for a file that is cut off or otherwise not what its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes())
        start = 4 + 4 * data[3]
        shape = np.frombuffer(data[4:start], ">u4").astype(int)
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}; get it again") from None


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
