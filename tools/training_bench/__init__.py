"""The benchmark of training: EdgeLoRA beside transformers with PEFT. `tools/bench_training --help` names its parts."""
