"""What scoring needs beyond training: packages of the extra `evaluate`, imported when used, and Java."""

import importlib
import shutil
from types import ModuleType


def import_extra(name: str) -> ModuleType:
    """The module `name` of a package of the extra `evaluate`; ValueError, saying how to install it, where it is not."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ValueError(
            f"{package} is not installed ({error}); metrics need the extra: bash launch/install.sh evaluate"
        ) from None


def find_java() -> str | None:
    """Path of the `java` that METEOR and the Penn Treebank tokenizer run on."""
    return shutil.which("java")
