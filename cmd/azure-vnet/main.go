// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnet is the CNI main plugin: a container gets an interface with an
// address of the virtual network, which the host routes to the VM's NIC. The address
// is lent in this process, or by another IPAM plugin that the configuration names.
package main

import (
	"os"

	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
)

// version is set when linking.
var version = "devel"

func main() {
	if len(os.Args) > 1 { // no runtime gives an argument
		os.Exit(serveWord(os.Args[1:]))
	}
	cni.Main(cni.Plugin{
		Name: "azure-vnet", Version: version, Main: true, CheckNames: checkNames, Code: lender.Code,
		Add: add, Del: del, Check: check, GC: gc, Status: status,
	})
}
