// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

type Source string
type Fault string

func (v *VNet) serve() error                   { return nil }
func (m *VM) setFault(s Source, f Fault) error { return nil }
