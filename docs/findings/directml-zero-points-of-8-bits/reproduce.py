"""A piece of a model with a wrong result: `python reproduce.py` needs onnxruntime-directml and numpy.

Values that are NaN in expected.npz (padding, for example) are not compared.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

print('onnxruntime-directml==1.24.4: MatMulNBits with zero points of 8 bits is wrong if a row has an odd number of blocks.')
folder = Path(__file__).parent
session = ort.InferenceSession(str(folder / "model.onnx"), providers=[('DmlExecutionProvider', {'device_id': '0', 'enable_graph_capture': '0'})])
print("ran on", session.get_providers()[0])
expected, recorded = np.load(folder / "expected.npz"), np.load(folder / "found.npz")
for name in expected.files:
    (found,) = session.run([name], dict(np.load(folder / "input.npz")))
    wanted = expected[name].astype(np.float64)
    counted = ~np.isnan(wanted)
    error = np.where(counted, np.abs(found - wanted), 0)
    worst = np.unravel_index(np.nanargmax(error), error.shape)
    norm = np.sqrt(np.square(wanted[counted]).sum())
    print(f"{name}, {counted.sum()} values compared")
    print(f"relative L2         {np.sqrt(np.square(error).sum()) / norm:.2e}")
    print(f"largest difference  {error[worst]:.6g} at {[int(i) for i in worst]}: "
          f"{found[worst]:.8g} instead of {wanted[worst]:.8g}")
    difference = np.abs(found.astype(np.float64) - recorded[name])[counted].max()
    print(f"against found.npz   {difference:.2g} at most")
