// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnet is the CNI main plugin. It gives a container an interface with an address of the virtual network,
// and the host routes the address between the container and the VM's NIC. The address is lent in this process, or by
// another IPAM plugin that the configuration names. With an argument, the command serves an operator: see words.go.
package main

import (
	"os"

	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
)

// version is set when linking.
var version = "devel"

func main() {
	if len(os.Args) > 1 { // a runtime gives no argument
		os.Exit(serveWord(os.Args[1:]))
	}
	cni.Main(cni.Plugin{
		Name: "azure-vnet", Version: version, Main: true, CheckNames: checkNames, Code: lender.Code,
		Add: add, Del: del, Check: check, GC: gc, Status: status,
	})
}
