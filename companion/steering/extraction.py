"""Directions between classes of prompts: class means of activations, and files that hold them.

A class is what the model itself did: harmful prompts that it refused, harmful ones that it complied with, and other prompts that
it answered. Directions come from the topics of `discover`; what is calibrated (gates, slopes, clips) comes from `validate`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import save as to_bytes
from safetensors.torch import load_file

from companion.base import chat, files, paths
from companion.base.device import to_host
from companion.base.errors import InputError
from companion.base.folders import prompts_folder
from companion.generation import forward
from companion.model.activations import on_output, prefix_once, shared_prefix
from companion.model.architecture import Subject
from companion.prompts import tokens
from companion.prompts.tokens import Openers

# Each class, and what is said where no prompt of discover belongs to it.
CLASSES: Final = {
    "refused": "the model refused no harmful prompt: add plainer ones, or use a model with safety training",
    "complied": "the model complied with no harmful prompt: add stronger jailbreak wrappers (T2)",
    "benign": "the model answered no harmless prompt: add harmless ones (T1, T2b or B)",
}
ROLES: Final = {
    "rejection": "mean(refused) - mean(complied): adding it moves towards refusing",
    "harmfulness": "mean(benign) - mean(complied): adding it moves towards what is answered because it is harmless",
}
ENDS: Final = {"rejection": ("refused", "complied"), "harmfulness": ("benign", "complied")}
FITTED: Final = ("resid_post", "mlp_out")  # the parts on which directions are fitted
FILE: Final = "directions.safetensors"
MANIFEST: Final = "directions.json"
SUPPLIED: Final = "directions"
PICKLES: Final = (".pt", ".pth", ".pkl", ".pickle", ".bin")


@dataclass(frozen=True)
class Directions:
    """Class means [layer, width] of one part, and the two directions between them in the paper's signs (`ROLES`).

    What needs a class without prompts is None. `counts` holds the number of discover prompts of each class.
    """

    part: str
    refused: Float[np.ndarray, "layer width"] | None
    complied: Float[np.ndarray, "layer width"] | None
    benign: Float[np.ndarray, "layer width"] | None
    counts: dict[str, int]

    @property
    def rejection(self) -> Float[np.ndarray, "layer width"] | None:
        """v_R: adding it moves towards refusing."""
        return None if self.refused is None or self.complied is None else self.refused - self.complied

    @property
    def harmfulness(self) -> Float[np.ndarray, "layer width"] | None:
        """v_H: adding it moves towards what is answered because it is harmless."""
        return None if self.benign is None or self.complied is None else self.benign - self.complied


@dataclass(frozen=True, eq=False)
class Fit:
    """Prompts of discover and validate with their unsteered activations at the last token.

    `prompts` has the columns id, text, kind, split, refused and `class` (one of `CLASSES`, or "" for a refused harmless
    prompt). `last` maps each of `FITTED` to an array [prompt, layer, width]; `instruction` is the residual stream at the last
    token of the instruction, `tail` tokens before the last one.
    """

    subject: Subject
    openers: Openers
    prompts: pd.DataFrame
    last: dict[str, Float[np.ndarray, "prompt layer width"]]
    instruction: Float[np.ndarray, "prompt layer d"]
    tail: int
    _directions: dict[str, Directions] = field(default_factory=dict, init=False, repr=False)  # every arm asks for them
    memo: dict[object, Any] = field(
        default_factory=dict, init=False, repr=False
    )  # what methods work out once for a fit

    @property
    def harmful(self) -> Bool[np.ndarray, "prompt"]:
        """Which prompts are harmful requests, whatever the model did with them."""
        return (self.prompts.kind == "harmful").to_numpy()

    def mask(self, split: str, *classes: str) -> Bool[np.ndarray, "prompt"]:
        """Which prompts belong to a split and, if any are named, to one of these classes."""
        mask = (self.prompts.split == split).to_numpy()
        return mask & self.prompts["class"].isin(classes).to_numpy() if classes else mask

    @property
    def missing(self) -> str:
        """Which class has no prompt in discover, and what to supply; "" where directions can be fitted.

        It stops the methods that need a direction from it, and C6 with them; methods that need none can still be tried.
        """
        return next((said for name, said in CLASSES.items() if not self.mask("discover", name).any()), "")

    def need(self, *classes: str) -> None:
        """`InputError` that says what to supply, if one of these classes has no prompt in discover."""
        for name in classes:
            if not self.mask("discover", name).any():
                raise InputError(CLASSES[name])

    def directions(self, part: str = "resid_post") -> Directions:
        """Class means on discover and the directions between them."""
        if part not in self.last:
            raise InputError(f"no activations of {part!r}; fitted were {', '.join(self.last)}")
        if part not in self._directions:
            masks = {name: self.mask("discover", name) for name in CLASSES}
            means = {n: self.last[part][mask].mean(0, dtype=float) if mask.any() else None for n, mask in masks.items()}
            self._directions[part] = Directions(part, **means, counts={n: int(mask.sum()) for n, mask in masks.items()})
        return self._directions[part]

    def direction(self, role: str, part: str = "resid_post") -> Float[np.ndarray, "layer width"]:
        """The direction of a role at every layer; `InputError` where a class is missing or both have the same activations."""
        self.need(*ENDS[role])
        made: np.ndarray = getattr(self.directions(part), role)
        if not made.any():
            one, other = ENDS[role]
            raise InputError(f"{one} and {other} harmful prompts have the same activations: are the labels right?")
        return made

    def subset(self, places: np.ndarray) -> Fit:
        """The fit on some of its prompts (a mask, or indices with repeats), without reading them anew."""
        table = self.prompts.iloc[np.flatnonzero(places) if places.dtype == bool else places].reset_index(drop=True)
        last = {name: values[places] for name, values in self.last.items()}
        return replace(self, prompts=table, last=last, instruction=self.instruction[places])


def fit_classes(subject: Subject, openers: Openers, prompts: pd.DataFrame) -> Fit:
    """Reads the activations of the prompts of discover and validate, one forward pass each.

    A missing class is no error here; a method that needs it says so.
    """
    kept = prompts[prompts.split.isin(["discover", "validate"])].reset_index(drop=True)
    if kept.empty:
        raise InputError("no prompt of the splits discover and validate: nothing to fit directions on")
    table = kept.assign(**{"class": classes(kept)})
    tail = _instruction_tail(subject)
    last = _activations(subject, list(table.text), tail)
    instruction = last.pop("instruction")
    return Fit(subject, openers, table, last, instruction, tail)


def classes(prompts: pd.DataFrame) -> list[str]:
    """The class of each prompt, by what the model itself did ("" for a harmless prompt that it refused).

    >>> classes(pd.DataFrame({"kind": ["harmful", "harmful", "harmless"], "refused": [True, False, False]}))
    ['refused', 'complied', 'benign']
    """
    harmful, refused = prompts.kind == "harmful", prompts.refused.astype(bool)
    return [str(name) for name in np.select([harmful & refused, harmful, ~refused], [*CLASSES], "")]


def _instruction_tail(subject: Subject) -> int:
    """Tokens from the instruction's last one to the prompt's last one: what the template writes behind a user turn."""
    assert subject.tokenizer is not None
    _, offsets, start = tokens.encode(subject.tokenizer, chat.STAND_IN)
    inside = offsets[:, 0] < start + len(chat.STAND_IN)
    return int((~inside[int(np.argmax(offsets[:, 1] > start)) :]).sum())


@torch.no_grad()
def _activations(
    subject: Subject, texts: Sequence[str], tail: int
) -> dict[str, Float[np.ndarray, "prompt layer width"]]:
    """Every part at the last token, and as "instruction" the residual stream at the instruction's last token."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*FITTED, "instruction")}
    order = []
    for places, ids in forward.buckets(subject, texts):
        order.append(places)
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in FITTED}
        n = shared_prefix(subject, ids)
        with prefix_once(subject, n), ExitStack() as hooks:
            for parts in subject.layers:
                hooks.enter_context(on_output(parts.block, seen["resid_post"].append))
                hooks.enter_context(on_output(parts.mlp_write, seen["mlp_out"].append))
            subject.model.base_model(ids, use_cache=False)
        if n:  # parts of layers were called for the prefix first
            seen |= {name: x[1::2] for name, x in seen.items() if name != "resid_post"}
        found = [(name, seen[name], -1) for name in FITTED if seen[name]]
        for name, layers, place in (*found, ("instruction", seen["resid_post"], -1 - tail)):
            rows[name].append(to_host(torch.stack([x[:, place] for x in layers], dim=1).float()))
    back = np.argsort(np.concatenate(order))
    return {name: np.concatenate(parts)[back] for name, parts in rows.items() if parts}


def save_directions(directions: Directions, fit: Fit, folder: str | Path) -> Path:
    """Writes the class means and a manifest (model, template, token, roles and signs, counts, hashes of prompt ids).

    A direction holds for one model, template and token alone, so these are compared when it is loaded.
    """
    folder = Path(folder)
    means = {name: getattr(directions, name) for name in CLASSES}
    tensors = {name: np.ascontiguousarray(mean, dtype=np.float64) for name, mean in means.items() if mean is not None}
    with files.replacing(folder / FILE) as scratch:
        scratch.write_bytes(to_bytes(tensors))  # the library's own writer lets nobody but its user read the file
    manifest = {
        "model_sha256": fit.subject.sha256,
        "model": fit.subject.name,
        "template_sha256": _template_hash(fit.subject),
        "token": "last token of the prompt, with the generation prompt",
        "part": directions.part,
        "roles": ROLES,
        "n": directions.counts,
        "prompt_id_sha256": {n: [_sha(str(one)) for one in fit.prompts.id[fit.mask("discover", n)]] for n in CLASSES},
        "file_sha256": hashlib.sha256((folder / FILE).read_bytes()).hexdigest(),
    }
    return files.write_json(manifest, folder / MANIFEST)


def load_directions(folder: str | Path, subject: Subject) -> Directions:
    """The directions of a folder, for this model and template only.

    Raises:
        InputError: a missing or torn file, or directions of another model, of another chat template, or of other roles.
    """
    folder = Path(folder)
    manifest = files.read_json(folder / MANIFEST)
    wanted = {"model_sha256": subject.sha256, "template_sha256": _template_hash(subject), "roles": ROLES}
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise InputError(
                f"{paths.relative(folder)} holds directions whose {name} differs from this model's ({subject.name}): a "
                "direction holds for one model, template and sign convention; fit it again"
            )
    path = folder / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != manifest.get("file_sha256"):
        why = f"{paths.relative(path)} is missing or not the file of its manifest; save the directions again"
        raise InputError(why)
    means = {name: to_host(tensor) for name, tensor in load_file(path).items()}
    return Directions(manifest["part"], **{name: means.get(name) for name in CLASSES}, counts=manifest["n"])


def read_samples(path: Path) -> dict[str, Float[np.ndarray, "layer sample width"]]:
    """Published activations or directions of each class, from .safetensors or .npz, every array [layer, sample, width].

    Numbers of any precision, bfloat16 too, come as float64.

    Raises:
        InputError: a pickle (with the line that converts it), another kind of file, or arrays of another shape or type.
    """
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
        if path.suffix == ".safetensors":
            tensors = load_file(path)  # numpy knows no bfloat16
            arrays = {name: to_host(x.double() if x.is_floating_point() else x) for name, x in tensors.items()}
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        why = f"{path.name} cannot be read ({str(error).splitlines()[0]}); get or convert it again"
        raise InputError(why) from error
    for name, array in arrays.items():
        is_number = array.dtype.kind in "fiu"
        is_finite = is_number and bool(np.isfinite(array).all())
        if array.ndim != 3 or not array.size or not is_finite:
            some = " (some not finite)" if is_number and not is_finite else ""
            raise InputError(
                f"{path.name}: {name} has shape {array.shape}, of type {array.dtype}{some}; expected finite numbers "
                "[layer, sample, width]: save it again in that form"
            )
    return {name: array.astype(float) for name, array in arrays.items()}


def find_supplied(prompt_set: str | Path) -> Path | None:
    """What the user put into `directions/` of the prompt set's folder to compare with; None where there is no such folder.

    It is a folder that `save_directions` wrote, or one file for `read_samples`; `InputError` for none or several files.
    """
    folder = prompts_folder(str(prompt_set)) / SUPPLIED
    if not folder.is_dir():
        return None
    if (folder / MANIFEST).is_file():
        return folder
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(found) != 1:
        raise InputError(
            f"{paths.relative(folder)} holds {len(found)} files; expected one .safetensors or .npz file, or {FILE} with its "
            f"{MANIFEST}"
        )
    return found[0]


def check_supplied(prompt_set: str | Path, subject: Subject) -> None:
    """`InputError` for directions beside the prompts that cannot be compared with this model's: before hours are spent."""
    if (path := find_supplied(prompt_set)) is not None:
        supplied_directions(path, subject)


def supplied_directions(path: Path, subject: Subject) -> dict[str, Float[np.ndarray, "layer width"]]:
    """The user's directions by role: of a saved folder, or from sample arrays named by class or by role.

    Classes are averaged and subtracted in our signs (`ROLES`); an array under a role's name is averaged over its samples and
    taken as it is. A role whose classes are not there is left out.

    Raises:
        InputError: no role can be made, or arrays of another number of layers or width than the model's.
    """
    if path.is_dir():
        made = load_directions(path, subject)
        return {name: getattr(made, name) for name in ROLES if getattr(made, name) is not None}
    means = {name: array.mean(1) for name, array in read_samples(path).items()}
    wanted = (subject.n_layers, subject.d_model)
    if bad := [name for name, mean in means.items() if mean.shape != wanted]:
        raise InputError(
            f"{path.name}: {bad[0]} has {means[bad[0]].shape} layers and width; {subject.name} has {wanted} (leave the "
            "embedding's own row out)"
        )
    found = {name: means[name] for name in ROLES if name in means}
    for name, (one, other) in ENDS.items():
        if name not in found and one in means and other in means:
            found[name] = means[one] - means[other]
    if not found:
        known = ", ".join([*CLASSES, *ROLES])
        had = ", ".join(means)
        raise InputError(f"{path.name} has the arrays {had}; expected two classes or a direction of {known}")
    return found


def cosines(own: Directions, theirs: Mapping[str, Float[np.ndarray, "layer width"]]) -> pd.DataFrame:
    """Cosine of each layer's two directions, one column a role (1: the same way; NaN where one of them is 0)."""
    columns = {}
    for name, other in theirs.items():
        if (mine := getattr(own, name)) is not None:
            sizes = np.linalg.norm(mine, axis=-1) * np.linalg.norm(other, axis=-1)
            columns[name] = np.divide((mine * other).sum(-1), sizes, out=np.full(len(mine), np.nan), where=sizes > 0)
    return pd.DataFrame(columns).rename_axis("layer")


def _template_hash(subject: Subject) -> str:
    assert subject.tokenizer is not None
    return _sha(str(subject.tokenizer.chat_template))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
