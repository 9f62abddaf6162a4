"""One row for each task and family: real data through `edgelora finetune`, `evaluate`, `merge`, `export` and `bench`."""
