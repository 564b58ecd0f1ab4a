// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

var linkName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)

// CheckLinkName refuses what cannot be asked for as the name of a link. The kernel takes
// more, which a shell, a path or a line of text would read as something else. The error
// does not repeat the name.
func CheckLinkName(name string) error {
	if !linkName.MatchString(name) {
		return errors.New("an interface name is 1 to 15 letters, digits, dots, dashes or underscores, and begins with a letter or a digit")
	}
	return nil
}

// checkExistingBridgeName refuses what no bridge of ours can have as its name. Earlier builds took more names than
// CheckBridgeName does, and their bridges stand.
func checkExistingBridgeName(name string) error {
	if len(name) > 15 || name == "." || name == ".." || strings.HasPrefix(name, hostPrefix) || strings.HasPrefix(name, peerPrefix) ||
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/\:"'%*?[];+!`, r) }) {
		return fmt.Errorf("%q cannot be the name of a bridge of azure-vnet", name)
	}
	return nil
}

// CheckBridgeName is CheckLinkName for a bridge, which cannot have the name of an endpoint.
func CheckBridgeName(name string) error {
	if strings.HasPrefix(name, hostPrefix) || strings.HasPrefix(name, peerPrefix) {
		return fmt.Errorf("names that begin with %s or %s are those of containers' links: give the bridge another", hostPrefix, peerPrefix)
	}
	return CheckLinkName(name)
}
