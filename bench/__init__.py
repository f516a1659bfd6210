"""The shoot-out: FC2 backends and tactics timed and checked on the same inputs. Run `python -m bench`."""
