// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// An error of a kernel without nf_tables, or without one of its parts, names the modules to load.
// Any other stays as it is.
func TestErrorsNameTheMissingModule(t *testing.T) {
	for _, missing := range []error{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		err := explainMissingModule(os.NewSyscallError("netlink receive", missing))
		if !errors.Is(err, missing) || !strings.Contains(err.Error(), "load the modules nf_tables,") {
			t.Errorf("%v becomes %v", missing, err)
		}
	}
	if err := explainMissingModule(unix.EPERM); err != unix.EPERM {
		t.Errorf("EPERM becomes %v", err)
	}
	if err := explainMissingModule(nil); err != nil {
		t.Errorf("no error becomes %v", err)
	}
}
