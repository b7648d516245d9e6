"""Work spread over devices and processes: meshes, shardings, ring attention, experts, start-up."""
