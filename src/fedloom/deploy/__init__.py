"""A federation across real sites: certificates and kits, what each site allows, and what each end writes down."""
