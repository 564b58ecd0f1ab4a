// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"azurevnet/internal/statefile"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The drop-ins keep systemd-networkd and NetworkManager from giving addresses to our links. They are under /run
// and so end with the boot, as the links do. The NIC stays in the care of these programs. The paths are below
// /run.
const (
	networkdDropIn       = "systemd/network/05-azure-vnet.network"
	networkManagerDropIn = "NetworkManager/conf.d/azure-vnet.conf"
)

// dropIns returns the texts of the drop-ins, by path below /run. Without NetworkManager's directory there is
// none for it.
func (h *Host) dropIns(v *view) map[string]string {
	names := []string{"azure*", hostPrefix + "*", peerPrefix + "*"}
	for _, n := range v.state.NICs {
		if n.Bridge != "" && !strings.HasPrefix(n.Bridge, "azure") {
			names = append(names, n.Bridge)
		}
	}
	slices.Sort(names)
	const head = "# Written by azure-vnet while its links stand.\n"
	all := map[string]string{networkdDropIn: head + "[Match]\nName=" + strings.Join(names, " ") + "\n\n[Link]\nUnmanaged=yes\n"}
	if _, err := os.Stat(filepath.Join(h.cfg.Run, filepath.Dir(filepath.Dir(networkManagerDropIn)))); err == nil {
		all[networkManagerDropIn] = head + "[keyfile]\nunmanaged-devices+=interface-name:" + strings.Join(names, ";interface-name:") + "\n"
	}
	return all
}

// dropInFaults are the drop-ins with another text than they should have.
func (h *Host) dropInFaults(v *view) (all []fault) {
	for name, text := range h.dropIns(v) {
		file := filepath.Join(h.cfg.Run, name)
		if is, err := os.ReadFile(file); err == nil && string(is) == text {
			continue
		}
		all = append(all, fault{what: file + " is not as it should be", mend: func() error {
			err := removeTemporaryFiles(file)
			if err == nil {
				err = statefile.Replace(file, []byte(text), 0o644)
			}
			if err != nil {
				return fmt.Errorf("keep systemd-networkd and NetworkManager off our links: %w", err)
			}
			return nil
		}})
	}
	return all
}

// removeDropIns removes the drop-ins, and what a killed writer left of them. If there are none, that is success.
func (h *Host) removeDropIns() error {
	var errs []error
	for _, name := range []string{networkdDropIn, networkManagerDropIn} {
		file := filepath.Join(h.cfg.Run, name)
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		errs = append(errs, removeTemporaryFiles(file))
	}
	return errors.Join(errs...)
}

// removeTemporaryFiles removes the temporary files of a drop-in's killed writers: see statefile.Replace. The caller holds the
// host's lock, so no writer lives. Neither systemd-networkd nor NetworkManager reads files of these names.
func removeTemporaryFiles(dropIn string) error {
	left, err := filepath.Glob(dropIn + ".tmp-*")
	for _, file := range left {
		err = errors.Join(err, os.Remove(file))
	}
	return err
}
