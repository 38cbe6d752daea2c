"""The plain records that leave the simulator; no computation."""
