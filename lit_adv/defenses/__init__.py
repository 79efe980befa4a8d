"""Defences, one file each; the contract is :class:`lit_adv.defense.Defense`."""
