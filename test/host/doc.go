// Copyright (c) The azure-vnet authors. MIT licence.

// Package host shows that the host keeps its network, and other programs keep theirs. It tries firewalls, VPNs and
// Azure's own plugin, Docker and CNI at once, installation and upgrade. The tests are its only code.
package host
