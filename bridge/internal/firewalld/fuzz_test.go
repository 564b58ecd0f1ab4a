// Copyright (c) The azure-vnet authors. MIT licence.

package firewalld

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

// reply is the body of a message, and its types in D-Bus's letters.
type reply struct {
	types string
	body  []byte
}

// message is the answer to a call, as the bus sends it. Without types it is an error. It is empty if no message says so.
func (r reply) message(serial uint32) []byte {
	m := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(serial)}}
	if sig, err := dbus.ParseSignature(r.types); err == nil && r.types != "" {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(sig)
	} else {
		m.Type, r.body = dbus.TypeError, nil
		m.Headers[dbus.FieldErrorName] = dbus.MakeVariant("org.freedesktop.DBus.Error.UnknownMethod")
	}
	var out bytes.Buffer
	if m.EncodeTo(&out, binary.LittleEndian) != nil {
		return nil
	}
	text := out.Bytes()
	binary.LittleEndian.PutUint32(text[4:], uint32(len(r.body)))
	binary.LittleEndian.PutUint32(text[8:], 1) // the message's own number
	return append(text, r.body...)
}

// told is a reply with that value.
func told(f *testing.F, value any) (string, []byte) {
	f.Helper()
	var out bytes.Buffer
	m := &dbus.Message{Type: dbus.TypeMethodReply, Body: []any{value}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(uint32(1)), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(value)),
	}}
	if err := m.EncodeTo(&out, binary.LittleEndian); err != nil {
		f.Fatal(err)
	}
	text := out.Bytes()
	return dbus.SignatureOf(value).String(), text[len(text)-int(binary.LittleEndian.Uint32(text[4:])):]
}

// serveBus is a bus with a firewalld that gives the replies: to the first call of a connection, which is the bus's own,
// its name; then by the method.
func serveBus(l net.Listener, replies *atomic.Pointer[map[string]reply]) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			in := bufio.NewReader(conn)
			for {
				line, err := in.ReadString('\n')
				if err != nil {
					return
				}
				switch line = strings.Trim(line, "\x00\r\n"); {
				case line == "AUTH":
					conn.Write([]byte("REJECTED EXTERNAL\r\n"))
				case line == "NEGOTIATE_UNIX_FD":
					conn.Write([]byte("ERROR\r\n"))
				case line != "BEGIN":
					conn.Write([]byte("OK 0123456789abcdef0123456789abcdef\r\n"))
				}
				if line == "BEGIN" {
					break
				}
			}
			for {
				call, err := dbus.DecodeMessage(in)
				if err != nil {
					return
				}
				member, _ := call.Headers[dbus.FieldMember].Value().(string)
				r := (*replies.Load())[member]
				if member == "Hello" {
					r = reply{"s", []byte("\x04\x00\x00\x00:1.1\x00")}
				}
				conn.Write(r.message(call.Serial()))
			}
		}()
	}
}

// FuzzReplies has firewalld reply anything that the bus passes on. The zones are read, or there is an error. Each link's
// zone is one that is known. A link joins only a zone that forwards and that does not accept everything, and two
// readings of one answer lead to the same steps.
func FuzzReplies(f *testing.F) {
	type zones map[string]map[string][]string
	type values map[string]dbus.Variant
	add := func(fallback, active, settings any) {
		a, b := told(f, fallback)
		c, d := told(f, active)
		e, g := told(f, settings)
		f.Add(a, b, c, d, e, g)
	}
	forwards := values{"forward": dbus.MakeVariant(true), "masquerade": dbus.MakeVariant(false), "target": dbus.MakeVariant("default"), "services": dbus.MakeVariant([]string{"ssh"})}
	add("public", zones{"work": {"interfaces": {"eth0"}}}, forwards)
	add("public", zones{"work": {"interfaces": {"e+"}}, "home": {"interfaces": {"eth+", "azure0"}, "sources": {"10.0.0.0/8"}}}, forwards)
	add("trusted", zones{}, values{"target": dbus.MakeVariant("ACCEPT"), "forward": dbus.MakeVariant("yes")})
	add("", zones{"": {"interfaces": {""}}}, values{"target": dbus.MakeVariant([]string{"x"})})
	add(uint32(7), []string{"public"}, "x")
	f.Add("s", []byte("\x06\x00\x00\x00public\x00"), "a{sa{sas}}", []byte{0, 0, 0, 0, 0, 0, 0, 0}, "", []byte{}) // of firewalld 0.8
	f.Add("", []byte{}, "", []byte{}, "", []byte{})

	bus := filepath.Join(f.TempDir(), "bus")
	l, err := net.Listen("unix", bus)
	if err != nil {
		f.Fatal(err)
	}
	defer l.Close()
	var replies atomic.Pointer[map[string]reply]
	go serveBus(l, &replies)
	f.Fuzz(func(t *testing.T, fallbackTypes string, fallback []byte, activeTypes string, active []byte, settingsTypes string, settings []byte) {
		all := map[string]reply{"getDefaultZone": {fallbackTypes, fallback}, "getActiveZones": {activeTypes, active}, "getZoneSettings2": {settingsTypes, settings}}
		for _, r := range all {
			if _, err := dbus.DecodeMessage(bytes.NewReader(r.message(1))); err != nil {
				t.Skip("the bus passes no such message on")
			}
		}
		replies.Store(&all)
		begun := time.Now()
		z, err := readZones(t.Context(), bus)
		if took := time.Since(begun); took > busTimeout+3*time.Second {
			t.Errorf("it is waited for %v", took)
		}
		if err != nil {
			return
		}
		if _, known := z.zones[z.defaultZone]; !known {
			t.Errorf("the default zone %q is not among %v", z.defaultZone, z.zones)
		}
		for link, name := range z.zoneOfLink {
			if _, known := z.zones[name]; !known {
				t.Errorf("%q is in the zone %q, which is not among %v", link, name, z.zones)
			}
		}
		links := map[string][]string{"azure0": {"eth0"}, "azv+": {"eth0", "eth1"}}
		for _, joined := range []map[string]string{nil, {"azure0": "work", "azure7": z.defaultZone}} {
			steps := z.Steps(links, joined)
			for _, s := range steps {
				if is := z.zones[s.Zone]; s.Act == Join && (!is.forwards || is.accepts || is.old || s.Zone == "trusted") {
					t.Errorf("%s is to join %s, which is %+v", s.Link, s.Zone, is)
				}
				if _, ours := links[s.Link]; !ours && joined[s.Link] == "" {
					t.Errorf("a step is about %q", s.Link)
				}
			}
			for range 4 {
				if diff := cmp.Diff(steps, z.Steps(links, joined)); diff != "" {
					t.Errorf("the same zones %v lead to other steps:\n%s", z.zoneOfLink, diff)
				}
			}
		}
		if body, err := dbus.DecodeMessage(bytes.NewReader(all["getActiveZones"].message(1))); err == nil {
			checkLinks(t, z, body.Body)
		}
	})
}

// checkLinks looks for each link that the bus told.
func checkLinks(t *testing.T, z *Zones, body []any) {
	t.Helper()
	if len(body) != 1 {
		return
	}
	active, _ := body[0].(map[string]map[string][]string)
	for name, binds := range active {
		for _, link := range binds["interfaces"] {
			if in, known := z.zoneOfLink[link]; !known || in != name && !slices.Contains(active[in]["interfaces"], link) {
				t.Errorf("%q is in the zone %q, and is read to be in %q", link, name, in)
			}
		}
	}
}
