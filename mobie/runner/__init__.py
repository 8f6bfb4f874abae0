"""The decode runner: the library's own model, a static cache and one captured step, for every kind of expert.

runner = DecodeRunner(model, batch=4, context=1280)
runner.prefill(tokens)                                     # (4, 1024)
new = runner.decode(256, Sampling(0.7, 0.95, seed=1))      # (4, 256)
runner.times.tokens_per_second, runner.times.prefill_seconds, runner.peak_memory_bytes
"""

from mobie.runner.clock import Times
from mobie.runner.runner import DecodeRunner
from mobie.runner.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "DecodeRunner", "Sampling", "Times"]
