// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

// InUseError says that another endpoint has the address, the MAC or the port of the host that was asked for.
type InUseError struct {
	Owner string // of the other endpoint, as the text spells it, so that a caller may replace it in the text by a name; empty: no endpoint of ours has it
	text  string
}

// Error names the other endpoint's owner, and says what to do.
func (e *InUseError) Error() string { return e.text }
