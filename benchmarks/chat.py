"""What switching adapters in a chat costs: time of a switch, memory of the adapters, on the demo's base.

    python benchmarks/chat.py

Four adapters of three kinds on one base, as tests/commands/test_chat.py has them. A switch is `Host.use`, which `/use` sets for the next
answer; its time does not depend on the base. Memory is that of all tensors, which counts what is shared once.
"""

import gc
import time

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

from lowalign import Base, Host
from lowalign.demo.configs import BASE, BASE_CONFIG

SWITCHES = 2000
KINDS = {
    "first (LoRA, rank 16)": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "second (LoRA, rank 16)": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prefix (20 virtual tokens)": PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
    "prompt (20 virtual tokens)": PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
}


def main() -> None:
    torch.set_num_threads(1)
    host = Host(Base.load(BASE, **vars(BASE_CONFIG)))
    before = held()
    print(f"base: {before / 1e6:.2f} MB")
    for text, config in KINDS.items():
        host.add(text.partition(" ")[0], config)
        after = held()
        print(f"{text}: {(after - before) / 1e6:.2f} MB")
        before = after
    names = [text.partition(" ")[0] for text in KINDS]
    started = time.perf_counter()
    for i in range(SWITCHES):
        with host.use(names[i % len(names)]):
            pass
    print(f"a switch: {(time.perf_counter() - started) / SWITCHES * 1e6:.0f} µs")


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
