// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

var linkName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)

// CheckLinkName refuses a name that may not be asked for as the name of a link. The kernel accepts more names.
// A shell, a path or a line of text would read some of these as something else. The error does not repeat the
// name.
func CheckLinkName(name string) error {
	if !linkName.MatchString(name) {
		return errors.New("an interface name is 1 to 15 letters, digits, dots, dashes or underscores, and begins with a letter or a digit")
	}
	return nil
}

// checkExistingBridgeName refuses a name that no bridge of ours can have. Earlier builds accepted more names
// than CheckBridgeName does, and bridges with such names exist.
func checkExistingBridgeName(name string) error {
	if len(name) > 15 || name == "." || name == ".." || strings.HasPrefix(name, hostPrefix) || strings.HasPrefix(name, peerPrefix) ||
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/\:"'%*?[];+!`, r) }) {
		return fmt.Errorf("%q cannot be the name of a bridge of azure-vnet", name)
	}
	return nil
}

// CheckBridgeName is CheckLinkName for a bridge. It also refuses names that begin as those of host ends and
// container ends do.
func CheckBridgeName(name string) error {
	if strings.HasPrefix(name, hostPrefix) || strings.HasPrefix(name, peerPrefix) {
		return fmt.Errorf("names that begin with %s or %s are those of containers' links: give the bridge another", hostPrefix, peerPrefix)
	}
	return CheckLinkName(name)
}
