"""The commands of `psp`, one file each: parse, build a config, call, print."""
