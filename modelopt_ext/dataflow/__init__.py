"""Where the channels of every Linear come from and go to, found by watching one forward.

- :mod:`.channels`: output side, pieces that the output is cut into;
- :mod:`.axes`: input side, parts that the input is joined from;
- :mod:`.activations`: which values are polar;
- :mod:`.tracker`: the dispatch mode that applies these three to every op;
- :mod:`.recorder`: hooks on the model, and the plan made of what was seen.
"""

from modelopt_ext.dataflow.recorder import DataflowRecorder, RecordFirstForward, record

__all__ = ["DataflowRecorder", "RecordFirstForward", "record"]
