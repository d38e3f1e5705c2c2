"""One thread for a model this small.

The workers of a parallel run share the cores. In each, PyTorch and ONNX Runtime would start a
thread for every core, and these threads spin while they wait for work; on models of three tiny
layers they do little else.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

VARIABLE = "OMP_NUM_THREADS"


def limit_threads(patch: pytest.MonkeyPatch) -> None:
    """Give PyTorch and ONNX Runtime sessions one thread, unless the code sets the number.

    Call it before PyTorch is imported: it reads the variable as it loads. Processes that a test
    starts inherit the variable.
    """
    patch.setenv(VARIABLE, os.environ.get(VARIABLE, "1"))
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError:  # some tests run where there is no onnxruntime
        return
    create = InferenceSession.__init__

    def create_with_one_thread(
        self: Any, model: Any, options: Any = None, *arguments: Any, **settings: Any
    ) -> None:
        options = settings.pop("sess_options", options) or SessionOptions()
        if options.intra_op_num_threads:
            create(self, model, options, *arguments, **settings)
            return
        options.intra_op_num_threads = 1
        try:
            create(self, model, options, *arguments, **settings)
        finally:
            options.intra_op_num_threads = 0

    patch.setattr(InferenceSession, "__init__", create_with_one_thread)
