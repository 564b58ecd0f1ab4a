// Copyright (c) The azure-vnet authors. MIT licence.

// Package test has what the tests of the product's promises share: the simulated VMs with a real dockerd or with CNI
// plugins, the places to ping and fetch from, and the builds under test. The promises themselves are in the packages
// below it: docker, cni, host, kill and repository. They may run at once.
package test
