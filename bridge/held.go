// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

// HeldError says that another endpoint has the address, the MAC or the port of the host that was asked for.
type HeldError struct {
	Owner string // of that endpoint, as the text has it, so that a caller who knows its name can put the name there; empty: it is none of ours
	text  string
}

// Error is the text.
func (e *HeldError) Error() string { return e.text }
