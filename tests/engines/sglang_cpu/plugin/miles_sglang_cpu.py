"""SGLang plugin (entry point `sglang.srt.plugins`): routed experts without a GPU.

Their buffer on the host is registered with the CUDA driver; without a GPU that is left out.
"""


def install() -> None:
    import torch
    from sglang.srt.mem_cache.pool_host import common

    if not torch.cuda.is_available():
        common._cuda_host_register = lambda *args, **kwargs: None
