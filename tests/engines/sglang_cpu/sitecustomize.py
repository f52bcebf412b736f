"""Lets real SGLang import and run on a machine without GPU libraries.

Put this directory on PYTHONPATH and name the absent packages in MILES_STAND_INS, separated by commas. SGLang imports
them at the top of modules that its CPU path needs, but calls none of their functions there. Their stand-ins offer
every attribute: a name with a capital letter is an empty class, any other name a module that also works as a
decorator. The packages stay absent for libraries that ask politely whether they are installed.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types

ABSENT = frozenset(filter(None, os.environ.get("MILES_STAND_INS", "").split(",")))
PROBES = ("transformers/utils/import_utils.py", "torch/utils/_triton.py")
"""Files whose import of a package is a question, not a need."""


class StandInClass(type):
    """Any attribute of an absent class is 0."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


class StandIn(types.ModuleType):
    """A module with every attribute."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._class(name) if name[0].isupper() else self._module(name)
        setattr(self, name, value)
        return value

    def _class(self, name):
        bases = (Exception,) if name.endswith(("Error", "Resources")) else ()
        return StandInClass(name, bases, {"__module__": self.__name__, "__init__": lambda *args, **kwargs: None})

    def _module(self, name):
        module = StandIn(f"{self.__name__}.{name}")
        module.__path__ = []
        return module

    def __call__(self, *args, **kwargs):
        """As a decorator: `@jit` and `@jit(...)` return the function itself."""
        bare = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if bare else lambda function: function

    def __or__(self, other):
        return other

    __ror__ = __or__


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent packages and everything below them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT or self._probed():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def _probed(self):
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.endswith(PROBES):
                return True
            frame = frame.f_back
        return False

    def create_module(self, spec):
        module = StandIn(spec.name)
        module.__path__ = []
        module.__version__ = "3.0.0"
        # Evaluated while SGLang's modules are imported.
        if spec.name == "triton":
            module.cdiv = lambda a, b: -(a // -b)
            module.next_power_of_2 = lambda n: 1 << max(0, (n - 1).bit_length())
        if spec.name == "triton.language":
            module.constexpr = type(
                "constexpr", (), {"__init__": lambda self, value=None: setattr(self, "value", value)}
            )
        return module

    def exec_module(self, module):
        pass


if "triton" in ABSENT:
    # torch must find out that there is no triton before the stand-in can be found.
    import torch._dynamo
    import torch._inductor.utils  # noqa: F401
if ABSENT:
    sys.meta_path.append(Finder())
