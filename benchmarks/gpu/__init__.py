"""What one GPU does with every part of psp: stages of measurements, in order of worth.

    python -m benchmarks.gpu --out DIR --model CHECKPOINT --data text.jsonl --eval-data text.txt

`docs/gpu.md` says what is measured and how to go on another day.
"""
