"""Jobs from and to the configurations of other trainers: Megatron-LM, MaxText, torchtitan (docs/convert.md)."""
