"""Parameter trees of real models: every leaf as the model's source uses it.

`trees/<family>.json` has the path and shape of every leaf, and what it is: "adamw", "muon" with its
axes (batch, in, out, and parts where the kernel is fused; a fused kernel left whole is right too),
or "either" where experts differ.
"""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import unflatten_dict

from muonclip_jax._specs import normalized_axes
from muonclip_jax.routing import MatrixRules, MatrixSpec, normalize_spec

TREES = pathlib.Path(__file__).parent / "trees"
FAMILIES = sorted(path.stem for path in TREES.glob("*.json"))
#: What `need_names` finds, as `python -m tools.stack_table` writes it.
NEED_NAMES = TREES / "need_names.txt"
#: Names of leaves that libraries give, which stay.
LEAF_NAMES = {"kernel", "weight", "w", "bias", "b", "scale", "embedding", "offset"}
#: Families with leaves that are refused where what tells of them, such as a bias, is masked.
NEED_VECTORS = "alphafold2 dreamerv3 equinox_zoo hf_wav2vec2 recurrentgemma recurrentgemma_scan"


@functools.cache
def leaves_of(family):
    return json.loads((TREES / f"{family}.json").read_text())["leaves"]


def nest(leaves):
    forms = {
        path: jax.ShapeDtypeStruct(leaf["shape"], jnp.float32) for path, leaf in leaves.items()
    }
    return unflatten_dict(forms, sep="/")


def decide(leaves, tree=None):
    """Path -> spec; leaves that are refused -> the error, and the rest is asked again."""
    refused = {}
    while True:
        rules = MatrixRules([(f"^{re.escape(path)}$", None) for path in refused])
        try:
            found = rules.decisions(nest(leaves) if tree is None else tree)
        except ValueError as error:
            new = [path for path in leaves if f"  {path} of shape" in str(error)]
            if not new:
                raise
            refused |= dict.fromkeys(new, str(error))
        else:
            return {path: decision.spec for path, _, decision in found} | refused


def is_right(expected, spec):
    """Whether a decision is right; a square matrix may be read transposed."""
    if expected["expect"] == "either":
        return spec is None or "if_muon" not in expected or _same(expected, "if_muon", spec)
    if expected["expect"] == "adamw" or spec is None:
        return (expected["expect"] == "adamw") == (spec is None)
    return _same({"matrix": expected, "shape": expected["shape"]}, "matrix", spec)


def _same(expected, key, spec):
    shape, want = expected["shape"], expected[key]
    spec = normalize_spec(spec, shape)
    sides = [sorted(axes) for axes in normalized_axes(spec)]
    square = math.prod(shape[a] for a in want["in"]) == math.prod(shape[a] for a in want["out"])
    if sides != [want["in"], want["out"]] and not (square and sides == [want["out"], want["in"]]):
        return False
    if not spec.splits:
        return True
    [split] = spec.splits
    parts = want.get("parts", {})
    return (split.axis, list(split.sizes)) == (parts.get("axis"), parts.get("sizes"))


def printed(error, path):
    """The decisions that pasting each printed rule for a leaf gives."""
    lines = error.split(f"  {path} of shape")[1].split("\n")[1:]
    for line in lines:
        if "rules=" not in line:
            return
        text = line.split("rules=")[1].split("  #")[0]
        yield eval(text, {"MatrixRules": MatrixRules, "MatrixSpec": MatrixSpec})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_is_right_by_default(family):
    leaves = leaves_of(family)
    found = decide(leaves)
    wrong = [
        (path, leaf["shape"], str(found[path]))
        for path, leaf in leaves.items()
        if isinstance(found[path], str) or not is_right(leaf, found[path])
    ]
    assert not wrong


@pytest.mark.parametrize("equal", [{60: 48, 10: 8}, {5: 6}, {10: 6, 60: 36, 22: 5}, {200: 80}])
def test_equal_sizes_lead_to_no_other_matrix(equal):
    """Heads as the width, layers as heads, a vocabulary as the hidden layer, and the like."""
    for family in FAMILIES:
        text = json.dumps(leaves_of(family))
        leaves = json.loads(re.sub(r"\d+", lambda m: str(equal.get(int(m[0]), m[0])), text))
        for path, spec in decide(leaves).items():
            assert isinstance(spec, str) or is_right(leaves[path], spec), (family, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_tree_is_read_as_the_whole_one(family):
    leaves, rules = leaves_of(family), MatrixRules()
    whole, tree = decide(leaves), nest(leaves)
    hide = lambda x, label: x if label == "muon" else optax.MaskedNode()  # noqa: E731
    masked = jax.tree.map(hide, tree, rules.labels(tree))
    for path, spec in decide(leaves, masked).items():
        refused = isinstance(spec, str) and family in NEED_VECTORS.split()
        assert spec == whole[path] or refused, path


def neutral(path, names):
    """The path with the names of modules replaced, numbers and names of leaves kept."""
    parts = re.split("([/.])", path)
    out = []
    for i, part in enumerate(parts):
        word = re.sub(r"_?\d+$", "", part)
        number = part[len(word) :]
        keep = part.isdigit() or part in "/." or (i >= len(parts) - 3 and part in LEAF_NAMES)
        out.append(part if keep else names.setdefault(word, f"n{len(names)}") + number)
    return "".join(out)


#: Query, key and value on an axis of their own, which only its name tells from heads.
C_ATTN = "transformer/blocks/stacked/attn/c_attn/weight/0"


def need_names(family):
    """Leaves, without numbers, that are refused or wrong once modules have neutral names."""
    names = {}
    real = {neutral(path, names): path for path in leaves_of(family)}
    leaves = {path: leaves_of(family)[old] for path, old in real.items()}
    found = decide(leaves)
    right = lambda path, x: not isinstance(found[path], str) and is_right(x, found[path])  # noqa: E731
    wrong = {path for path, x in leaves.items() if not right(path, x)}
    for path in wrong:
        # Never another matrix in silence: at most a table, a head, a router or a factor.
        refused = isinstance(found[path], str)
        assert refused or leaves[path]["expect"] == "adamw" or real[path] == C_ATTN, real[path]
    return sorted({re.sub(r"\d+", "N", real[path]) for path in wrong})


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_modules_are_needed_for_these_leaves_alone(family):
    stored = [line.split(" ") for line in NEED_NAMES.read_text().splitlines()]
    assert need_names(family) == [path for name, path in stored if name == family]


@pytest.mark.parametrize("family", ["tunix_qwen3_moe", "gemma_gemma3", "maxtext_qwen3_next"])
def test_one_of_the_printed_rules_is_right(family):
    names = {}
    leaves = {neutral(path, names): leaf for path, leaf in leaves_of(family).items()}
    errors = {path: found for path, found in decide(leaves).items() if isinstance(found, str)}
    assert errors
    for path, error in errors.items():
        one = {path: leaves[path]}
        specs = [rules.decisions(nest(one))[0][2].spec for rules in printed(error, path)]
        assert any(is_right(leaves[path], spec) for spec in specs), path
        for rules in printed(error, path):
            [(pattern, _)] = rules.rules
            alike = [x["shape"] for p, x in leaves.items() if re.search(pattern, p)]
            assert all(shape == leaves[path]["shape"] for shape in alike)
