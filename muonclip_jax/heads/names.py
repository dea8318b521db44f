"""Names along a parameter's path, read the way the libraries that choose them mean them.

The last name says what the leaf is for its module ("kernel", "bias"), the name before it which
module that is ("query", "Dense_0"), and those before say where it sits ("attention", "MoeBlock_0").
Libraries write the same word differently, so names are compared in one spelling: "MoeBlock_0",
"moe_block" and "MoEBlock" are all "moe_block". Whole words are compared, never parts of them: an
"overhead_proj" is no head.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

#: Last names that say nothing about the module; the name before them does.
GENERIC = frozenset({"kernel", "weight", "weights", "w"})
#: Names of a module list or of scanned layers. Followed by a number they are a list.
_CONTAINER = re.compile(r"(?:.*_)?(?:layers|blocks|stack|stacked|scan|scanned|repeats?|stages)")
#: A name that, with a number, is one layer; class names ("MoeBlock_0") do not count.
_LAYER = re.compile(r"(?:[a-z0-9_]*_)?(?:res|encoder|decoder)?(?:layer|block|stage|unit|h)s?_?\d+")
_OUTER = frozenset({"params", "~", ""})


@dataclass(frozen=True)
class LeafName:
    """One parameter's names in one spelling.

    Args:
        leaf: The last name.
        role: The most telling name: the last one that is neither generic nor a number.
        scope: The names before the role, outermost first.
        stacked: Whether a container of layers stands in the path and no number tells one of them,
            as `nn.scan` makes them: every leaf below has an axis of layers.
        grouped: Whether there is such a container at all. One that holds numbered modules
            ("layers/layer_0") may be scanned several at a time, or be a plain dict of layers.
    """

    leaf: str
    role: str
    scope: tuple[str, ...]
    stacked: bool
    grouped: bool = False


def spelling(name: str) -> str:
    """Returns a name in the one spelling in which names are compared.

    Example:
        >>> [spelling(name) for name in ("MoeBlock_0", "Wq", "out-proj")]
        ['moe_block_0', 'wq', 'out_proj']
    """
    name = name.replace("MoE", "Moe").strip("_")
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return name.lower().replace("-", "_")


@lru_cache(maxsize=65536)
def read_path(path: str) -> LeafName:
    """Reads a path such as "decoder/block_0/attention/query/kernel".

    Example:
        >>> name = read_path("params/decoder/layers_3/MoeBlock_0/wi_0")
        >>> name.role, name.scope, name.stacked
        ('wi', ('decoder', 'layers', 'moe_block'), False)
        >>> read_path("decoder/layers/attention/query/kernel").stacked
        True
    """
    parts = [part for part in re.split(r"[/.]", path) if part not in _OUTER]
    names: list[str] = []
    numbered: list[bool] = []
    one_layer: list[bool] = []
    for part in parts:
        if part.isdigit():
            if numbered:
                numbered[-1] = True
                one_layer[-1] = True
            continue
        spelled = spelling(part)
        name = re.sub(r"_\d+$", "", spelled)
        names.append(name)
        numbered.append(name != spelled)
        one_layer.append(_LAYER.fullmatch(part) is not None)
    for i, (name, has_number) in enumerate(zip(names, numbered, strict=True)):
        if has_number and name in ("expert", "experts"):
            names[i] = "one_expert"
    containers = [
        i for i, name in enumerate(names[:-1]) if _CONTAINER.fullmatch(name) and not numbered[i]
    ]
    stacked = bool(containers) and not any(one_layer[containers[0] :])
    if not names:
        return LeafName("", "", (), False)
    role = len(names) - 1
    if names[role] in GENERIC and role:
        role -= 1
    return LeafName(names[-1], names[role], tuple(names[:role]), stacked, bool(containers))
