// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// networkd and networkManager are the drop-ins that keep those from pulling a
// NIC out of its bridge, or addressing it again, when they are restarted. They
// lie under /run and so end with the boot, as the bridges do.
const (
	networkd       = "systemd/network/05-azure-vnet.network"
	networkManager = "NetworkManager/conf.d/azure-vnet.conf"
)

// keepOff writes the drop-ins for the bridges of the journal, or removes them
// with the last.
func (h *Host) keepOff(ctx context.Context) error {
	s, err := h.state()
	if err != nil {
		return err
	}
	var names []string
	for name, b := range s.Bridges {
		names = append(names, name, b.NIC)
	}
	slices.Sort(names)
	if len(names) > 0 {
		names = append(names, "azv*")
	}
	if err := h.dropIn(networkd, "[Match]\nName="+strings.Join(names, " ")+"\n\n[Link]\nUnmanaged=yes\n", len(names) > 0); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(h.cfg.Run, "NetworkManager")); err != nil {
		return nil // no NetworkManager on this host
	}
	return h.dropIn(networkManager, "[keyfile]\nunmanaged-devices+=interface-name:"+strings.Join(names, ";interface-name:")+"\n", len(names) > 0)
}

func (h *Host) dropIn(name, text string, wanted bool) error {
	file := filepath.Join(h.cfg.Run, name)
	text = "# Written by azure-vnet while its bridges stand.\n" + text
	is, err := os.ReadFile(file)
	switch {
	case !wanted:
		if err = os.Remove(file); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	case err == nil && string(is) == text:
	default:
		if err = os.MkdirAll(filepath.Dir(file), 0o755); err == nil {
			err = replaceFile(file, []byte(text), 0o644)
		}
	}
	if err != nil {
		return fmt.Errorf("keep systemd-networkd and NetworkManager off the bridges: %w", err)
	}
	return nil
}

// replaceFile puts data in the place of file, whole or not at all.
func replaceFile(file string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
