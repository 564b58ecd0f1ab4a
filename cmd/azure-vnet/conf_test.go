// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"strings"
	"testing"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
)

func TestNamesThatNoLinkCanHaveAreRefused(t *testing.T) {
	const characters = "1 to 15 letters, digits, dots, dashes or underscores"
	for _, tt := range []struct {
		conf cni.Conf
		says string // "": accepted
	}{
		{cni.Conf{}, ""},
		{cni.Conf{Bridge: "azure0", Master: "eth0"}, ""},
		{cni.Conf{Master: "00:0D:3A:04:75:98"}, ""},
		{cni.Conf{Bridge: "a/b"}, `bridge "a/b": an interface name is ` + characters},
		{cni.Conf{Bridge: "azure0@eth0"}, characters},
		{cni.Conf{Bridge: "a234567890123456"}, characters},
		{cni.Conf{Bridge: "azv0"}, "names that begin with azv or azc are those of containers' links"},
		{cni.Conf{Bridge: "azv0", Mode: cni.ModeTransparent}, "names that begin with azv"},
		{cni.Conf{Master: "eth 0"}, `master "eth 0" is neither a MAC nor a name`},
	} {
		switch err := checkNames(tt.conf); {
		case tt.says == "" && err != nil:
			t.Errorf("%+v: %v", tt.conf, err)
		case tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)):
			t.Errorf("%+v: %v; it is to say %q", tt.conf, err, tt.says)
		}
	}
}

// The configuration and the bridge spell the modes alike, so add converts one to the other.
func TestModesOfTheConfigurationAreTheBridges(t *testing.T) {
	if cni.ModeBridge != string(bridge.ModeBridge) || cni.ModeTransparent != string(bridge.ModeTransparent) || len(bridge.Modes) != 2 {
		t.Errorf("the bridge has %v", bridge.Modes)
	}
}
