"""Programs for other runtimes: ONNX, ExecuTorch and AOTInductor files that need no minrnn where they run."""

from minrnn.export.exporting import Exported as Exported
from minrnn.export.exporting import export_sequence as export_sequence
from minrnn.export.exporting import export_step as export_step
from minrnn.export.formats import FORMATS as FORMATS
from minrnn.export.formats import Format as Format
from minrnn.export.formats import format_of as format_of
from minrnn.export.program import Port as Port
