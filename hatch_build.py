"""Compiles the kernels when the package is built or installed, where there is a C++ compiler.

Without one, or when it fails, the package is built without kernels and says so: it then decodes
with PyTorch's operations. VISAVIS_BUILD_NATIVE=0 leaves them out, =1 makes a failure an error, as
wheels that are published are built.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "VISAVIS_BUILD_NATIVE"


class NativeBuildHook(BuildHookInterface):
    """Adds the compiled library to a wheel, or puts it into the tree of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get(VARIABLE, "")
        if self.target_name != "wheel" or wanted == "0":
            return
        folder = Path(self.root) / "src" / "visavis" / "native"
        spec = importlib.util.spec_from_file_location("visavis_build", folder / "build.py")
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        library = folder / build.FILE_NAME
        try:
            build.compile_library(library)
        except build.BuildError as error:
            if wanted == "1":
                raise
            library.unlink(missing_ok=True)
            self.app.display_warning(f"visavis is built without compiled kernels: {error}")
            return
        from packaging.tags import sys_tags

        # It is loaded through ctypes: any Python 3 of this system can.
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"src/visavis/native/{build.FILE_NAME}")
