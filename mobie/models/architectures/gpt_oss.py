"""GPT-OSS: windowed and full attention in turn, with sinks and biases; experts transposed, with biases.

Biases, the sinks (one number per head) and the router, which takes the softmax after the top-k, are kept in 16 bits.
"""

from mobie.models.architecture import Architecture

ARCHITECTURE = Architecture("gpt_oss", router="mlp.router")
