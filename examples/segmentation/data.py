"""A data set in CamVid's layout, decoded and scaled down once and kept in memory.

A split is a folder or a zip file that holds ``images/NAME.jpg`` (or ``.png``) and ``masks/NAME.png``, whose
pixel values are class ids. Beside the splits lies ``classes.json``:
``{"ignore_id": 11, "classes": [{"id": 0, "name": "sky", "colour": [128, 128, 128]}, ...]}``.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

KINDS = ("images", "masks")


class Classes(NamedTuple):
    """``names`` of the learned classes, display ``colours`` uint8 (256, 3) by id, and the void id."""

    names: tuple[str, ...]
    colours: np.ndarray
    ignore_id: int


class Split(NamedTuple):
    """``images`` uint8 (N, 3, H, W), ``labels`` uint8 (N, H, W), ``full_labels`` the masks as they came."""

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor
    full_labels: Tensor

    def select(self, index: Tensor) -> "Split":
        return Split(
            tuple(self.names[i] for i in index),
            self.images[index],
            self.labels[index],
            self.full_labels[index],
        )


def load_classes(root: Path) -> Classes:
    """Read ``classes.json``. Learned ids must be 0..C-1, the void id above them.

    Raises:
        FileNotFoundError: no ``classes.json`` in ``root``.
        ValueError: ids with a gap.
    """
    described = json.loads((root / "classes.json").read_text())
    ignore_id = described["ignore_id"]
    entries = sorted(described["classes"], key=lambda entry: entry["id"])
    learned = [entry for entry in entries if entry["id"] != ignore_id]
    if [entry["id"] for entry in learned] != list(range(len(learned))):
        raise ValueError(f"classes.json: expected learned ids 0..C-1, got {[e['id'] for e in learned]}")
    colours = np.zeros((256, 3), np.uint8)
    for entry in entries:
        colours[entry["id"]] = entry["colour"]
    return Classes(tuple(entry["name"] for entry in learned), colours, ignore_id)


def find_split(root: Path, split: str) -> Path:
    """``root/<split>/``, or the one zip file in ``root`` whose name ends in ``<split>.zip``."""
    if (root / split).is_dir():
        return root / split
    archives = sorted(root.glob(f"*{split}.zip"))
    if len(archives) != 1:
        found = [archive.name for archive in archives]
        raise FileNotFoundError(
            f"{root}: expected a folder {split}/ or one *{split}.zip, got {found or 'neither'}"
        )
    return archives[0]


def load_split(path: Path, size: tuple[int, int], progress: bool = True) -> Split:
    """Decode a split and scale it to ``size`` (height, width): images by area, masks by the nearest pixel.

    Raises:
        ValueError: no image, an image without a mask, masks in colours, or masks of several sizes.
    """
    return _scale(path, _pairs(path), size, progress)


def load_frames(images: Path, masks: Path, size: tuple[int, int], progress: bool = True) -> Split:
    """:func:`load_split` of two folders: ``images`` with NAME.jpg or .png, ``masks`` with NAME.png."""
    members = {
        f"{kind}/{p.name}": p
        for kind, folder in zip(KINDS, (images, masks), strict=True)
        for p in folder.iterdir()
    }
    return _scale(images, _decode(images, set(members), lambda m: members[m].read_bytes()), size, progress)


def _scale(
    path: Path, pairs: Iterator[tuple[str, Image.Image, Image.Image]], size: tuple[int, int], progress: bool
) -> Split:
    height, width = size
    names, images, labels, full_labels = [], [], [], []
    for name, image, mask in tqdm(pairs, desc=path.name, unit="image", disable=not progress):
        names.append(name)
        if len(mask.getbands()) > 1:
            raise ValueError(f"{path}: expected masks of class ids, got mode {mask.mode} for {name}")
        full_labels.append(np.asarray(mask))
        images.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BOX)))
        labels.append(np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)))
    if not names:
        raise ValueError(f"{path}: expected images/NAME.jpg or .png, got none")
    if len({mask.shape for mask in full_labels}) > 1:
        raise ValueError(f"{path}: expected masks of one size, got {sorted({m.shape for m in full_labels})}")
    return Split(
        tuple(names),
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(full_labels)),
    )


def hold_out(split: Split, share: float) -> tuple[Split, Split]:
    """Cut ``split`` in two for choosing hyper-parameters: (fit, held out).

    The last ``share`` of each drive (the part of the name before ``_``) is held out: neighbouring frames show
    the same scene, so a random cut would put near-copies of the training frames into the held-out part. Where
    the names tell of no drives that long, it is the last ``share`` of all.

    Raises:
        ValueError: too few images for two parts.
    """
    drives: dict[str, list[int]] = {}
    for i, name in enumerate(split.names):
        drives.setdefault(name.split("_")[0], []).append(i)
    for members in (drives.values(), [list(range(len(split.names)))]):
        cuts = [(drive, len(drive) - round(share * len(drive))) for drive in members]
        fit = [i for drive, cut in cuts for i in drive[:cut]]
        held = [i for drive, cut in cuts for i in drive[cut:]]
        if fit and held:
            break
    else:
        raise ValueError(f"expected enough images to hold out {share:.0%} of them, got {len(split.names)}")
    return split.select(torch.tensor(fit)), split.select(torch.tensor(held))


def _pairs(path: Path) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    if path.is_dir():
        members = {p.relative_to(path).as_posix() for p in path.glob("*/*")}
        yield from _decode(path, members, lambda member: (path / member).read_bytes())
    else:
        with zipfile.ZipFile(path) as archive:
            yield from _decode(path, set(archive.namelist()), archive.read)


def _decode(path: Path, members: set[str], read: Callable[[str], bytes]):
    for member in sorted(members):
        entry = PurePosixPath(member)
        if entry.parent.name != "images" or entry.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        mask = str(entry.parent.parent / "masks" / f"{entry.stem}.png")
        if mask not in members:
            raise ValueError(f"{path}: expected {mask} beside {member}, got no such file")
        yield entry.stem, Image.open(io.BytesIO(read(member))), Image.open(io.BytesIO(read(mask)))
