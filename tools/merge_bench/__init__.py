"""The benchmark of merging: bundles of EdgeLoRA beside those of PEFT and others. `tools/bench_merge --help` names its parts."""
