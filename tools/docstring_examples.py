"""What the API pages show of docstrings and signatures.

- The docstrings have one example under `Example:`; griffe knows the section as `Examples:` alone.
- A default that is a named constant is shown as its value.
"""

import importlib
import re
from typing import Any

import griffe

_HEADING = re.compile(r"^( *)Example:$", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Changes each object before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe with each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called by griffe with each function that it has read."""
        for parameter in func.parameters:
            if isinstance(parameter.default, griffe.ExprName | griffe.ExprAttribute):
                value: Any = importlib.import_module(func.module.path)
                for name in str(parameter.default).split("."):
                    value = getattr(value, name)
                parameter.default = repr(value)
