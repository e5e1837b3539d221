"""From one command to a machine in a cloud and back, with nothing left running."""
