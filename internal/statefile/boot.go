// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"fmt"
	"os"
	"strings"
)

// BootID returns the id of this boot, which the kernel makes anew at each boot. A state file that has another one is of an
// earlier boot. Only Linux has such an id; elsewhere the error says so.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}
