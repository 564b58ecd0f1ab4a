// Copyright (c) The azure-vnet authors. MIT licence.

// Package host shows that the host and all that others run on it stay as they are: beside firewalls, VPNs and
// Azure's own plugin, with Docker and CNI at once, through installation and upgrade. The tests are its only code.
package host
