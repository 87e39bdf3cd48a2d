"""The paper's claims as experiments that anyone can repeat on any model: `ddt probe NAME`."""
