"""Steering directions on disk: safetensors beside a JSON manifest that says for which model they hold.

A direction means nothing without the model, the template and the token it was read at, so these stand in the manifest and
are compared when it is loaded. Published sample arrays [layer, sample, width] can be read for comparison; pickles are not,
because loading one runs code.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from helpers import steering_fit as sf
from helpers import store
from helpers.errors import InputError
from helpers.preflight import prompts_folder
from helpers.steering_fit import Directions, Fit
from helpers.subject import Subject

FILE: Final = "directions.safetensors"
MANIFEST: Final = "directions.json"
ROLES: Final = {
    "rejection": "mean(refused) - mean(complied): adding it moves towards refusing",
    "harmfulness": "mean(benign) - mean(complied): adding it moves towards what is answered because it is harmless",
}
PARTS_OF: Final = {"rejection": ("refused", "complied"), "harmfulness": ("benign", "complied")}
SUPPLIED: Final = "directions"
PICKLES: Final = (".pt", ".pth", ".pkl", ".pickle", ".bin")


def save(directions: Directions, fit: Fit, folder: str | Path) -> Path:
    """Writes the class means and a manifest (model, template, token, roles and signs, counts, hashes of prompt ids)."""
    folder = Path(folder)
    means = {name: getattr(directions, name) for name in sf.CLASSES}
    tensors = {name: np.ascontiguousarray(mean, dtype=np.float64) for name, mean in means.items() if mean is not None}
    with store.replacing(folder / FILE) as scratch:
        scratch.write_bytes(to_bytes(tensors))  # the library's own writer lets nobody but its user read the file
    ids = {name: [_sha(str(one)) for one in fit.prompts.id[sf.rows(fit, "discover", name)]] for name in sf.CLASSES}
    manifest = {
        "model_sha256": fit.subject.sha256,
        "model": fit.subject.name,
        "template_sha256": template_hash(fit.subject),
        "token": "last token of the prompt, with the generation prompt",
        "part": directions.part,
        "roles": ROLES,
        "n": directions.counts,
        "prompt_id_sha256": ids,
        "file_sha256": hashlib.sha256((folder / FILE).read_bytes()).hexdigest(),
    }
    return store.write_json(manifest, folder / MANIFEST)


def load(folder: str | Path, subject: Subject) -> Directions:
    """The directions of a folder, for this model and template only.

    Raises:
        InputError: a missing or torn file, or directions of another model, of another chat template, or of other roles.
    """
    folder = Path(folder)
    manifest = store.read_json(folder / MANIFEST)
    wanted = {"model_sha256": subject.sha256, "template_sha256": template_hash(subject), "roles": ROLES}
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise InputError(
                f"{store.relative(folder)} holds directions whose {name} differs from this model's ({subject.name}): a "
                "direction holds for one model, template and sign convention; fit it again"
            )
    path = folder / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != manifest.get("file_sha256"):
        raise InputError(
            f"{store.relative(path)} is missing or not the file of its manifest; save the directions again"
        )
    tensors = load_file(path)
    if bad := [
        name for name, mean in tensors.items() if mean.shape[0] != subject.n_layers and manifest["part"] != "neurons"
    ]:
        raise InputError(f"{store.relative(path)}: {bad[0]} has not one row for each of {subject.n_layers} layers")
    return Directions(manifest["part"], **{name: tensors.get(name) for name in sf.CLASSES}, counts=manifest["n"])


def read_samples(path: str | Path) -> dict[str, Float[np.ndarray, "layer sample width"]]:
    """Published activations or directions of each class, from .safetensors or .npz, every array [layer, sample, width].

    Raises:
        InputError: a pickle (with the line that converts it), another kind of file, or arrays of another shape.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise InputError(
            f"{path.name} is a pickle, which can run code when it is loaded. Convert it on a machine you can lose: "
            'python -c "import sys, torch; from safetensors.torch import save_file; x = torch.load(sys.argv[1], '
            'weights_only=True); save_file({k: v.contiguous() for k, v in x.items()}, sys.argv[2])" '
            f"{path.name} {path.stem}.safetensors"
        )
    if path.suffix not in (".safetensors", ".npz"):
        raise InputError(f"{path.name}: expected .safetensors or .npz with one array [layer, sample, width] a class")
    try:
        arrays = load_file(path) if path.suffix == ".safetensors" else _read_npz(path)
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path.name} cannot be read ({str(error).splitlines()[0]}); get or convert it again"
        ) from error
    for name, array in arrays.items():
        if array.ndim != 3 or not np.isfinite(array).all():
            raise InputError(
                f"{path.name}: {name} has shape {array.shape}; expected finite numbers [layer, sample, width]"
            )
    return arrays


def find_supplied(prompt_set: str | Path) -> Path | None:
    """What the user put into `directions/` of the prompt set's folder to compare with: a folder that `save` wrote, or one
    file for `read_samples`. None where there is no such folder.

    Raises:
        InputError: nothing in it that can be read, or several files.
    """
    folder = prompts_folder(str(prompt_set)) / SUPPLIED
    if not folder.is_dir():
        return None
    if (folder / MANIFEST).is_file():
        return folder
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(found) != 1:
        raise InputError(
            f"{store.relative(folder)} holds {len(found)} files; expected one .safetensors or .npz file, or {FILE} with its "
            f"{MANIFEST}"
        )
    return found[0]


def supplied(path: Path, subject: Subject) -> dict[str, Float[np.ndarray, "layer width"]]:
    """The user's directions by role: of a saved folder, or from sample arrays named by class or by role.

    Classes are averaged and subtracted in our signs (`ROLES`); an array under a role's name is averaged over its samples and
    taken as it is. A role whose classes are not there is left out.

    Raises:
        InputError: no role can be made, or arrays of another number of layers or width than the model's.
    """
    if path.is_dir():
        made = load(path, subject)
        return {name: getattr(made, name) for name in ROLES if getattr(made, name) is not None}
    means = {name: array.mean(1, dtype=float) for name, array in read_samples(path).items()}
    wanted = (subject.n_layers, subject.d_model)
    if bad := [name for name, mean in means.items() if mean.shape != wanted]:
        raise InputError(
            f"{path.name}: {bad[0]} has {means[bad[0]].shape} layers and width; {subject.name} has {wanted} (leave the "
            "embedding's own row out)"
        )
    found = {name: means[name] for name in ROLES if name in means}
    for name, (one, other) in PARTS_OF.items():
        if name not in found and one in means and other in means:
            found[name] = means[one] - means[other]
    if not found:
        known = ", ".join([*sf.CLASSES, *ROLES])
        raise InputError(
            f"{path.name} has the arrays {', '.join(means)}; expected two classes or a direction of {known}"
        )
    return found


def cosines(own: Directions, theirs: Mapping[str, Float[np.ndarray, "layer width"]]) -> pd.DataFrame:
    """Cosine of each layer's two directions, one column a role (1: the same way; NaN where one of them is 0)."""
    columns = {}
    for name, other in theirs.items():
        mine = getattr(own, name)
        if mine is None:
            continue
        sizes = np.linalg.norm(mine, axis=-1) * np.linalg.norm(other, axis=-1)
        columns[name] = np.divide((mine * other).sum(-1), sizes, out=np.full(len(mine), np.nan), where=sizes > 0)
    return pd.DataFrame(columns).rename_axis("layer")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def template_hash(subject: Subject) -> str:
    """sha256 of the chat template; of the empty text where there is no tokenizer."""
    return _sha("" if subject.tokenizer is None else str(subject.tokenizer.chat_template))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
