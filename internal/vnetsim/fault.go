// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// Source is a server that tells a VM its addresses.
type Source string

// The sources of an Azure VM.
const (
	HostAgent Source = "host agent"
	IMDS      Source = "imds"
)

func (s Source) addr() netip.Addr {
	if s == IMDS {
		return IMDSAddr
	}
	return HostAgentAddr
}

// Fault is a way in which a source fails.
type Fault string

const (
	Healthy   Fault = ""          // the VM's addresses
	BlackHole Fault = "blackhole" // packets vanish
	Refused   Fault = "refused"   // connections are reset
	Status500 Fault = "500"       // an internal error of the server
	Status401 Fault = "401"       // as where the Metadata Security Protocol is enforced
	Throttled Fault = "429"       // with Retry-After: 1
	HTML      Fault = "html"      // 200 with a proxy's log-in page
	Truncated Fault = "truncated" // half of the document
	Huge      Fault = "huge"      // the right document, 10 MB of it white space
	Empty     Fault = "empty"     // 200 with a document without interfaces
	Chunked   Fault = "chunked"   // the right document without a Content-Length: not a failure
	Slow      Fault = "slow"      // the right document, 1.5 s late: not a failure
	Stale     Fault = "stale"     // the last secondary address of each NIC is missing: the sources disagree
)

// Faults are all but Healthy.
var Faults = []Fault{BlackHole, Refused, Status500, Status401, Throttled, HTML, Truncated, Huge, Empty, Chunked, Slow, Stale}

// SetFault makes a source fail for every VM, also those added later, until it
// is set to Healthy.
func (v *VNet) SetFault(s Source, f Fault) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.faults[s] = f
	for _, vm := range v.vms {
		if err := vm.setFault(s, f); err != nil {
			return err
		}
	}
	return nil
}

// SetFault makes a source fail for this VM.
func (m *VM) SetFault(s Source, f Fault) error {
	m.vnet.mu.Lock()
	defer m.vnet.mu.Unlock()
	return m.setFault(s, f)
}

// setFault is called with the VNet's mutex held.
func (m *VM) setFault(s Source, f Fault) error {
	rules := elements("delete", faultElements(m.Primary, s, m.faults[s])) + elements("add", faultElements(m.Primary, s, f))
	if err := m.vnet.fabric.nft(rules); err != nil {
		return fmt.Errorf("make the %s of %s fail: %w", s, m.Name, err)
	}
	m.faults[s] = f
	return nil
}

// faultElements is the element of fabricRules that makes a source fail for the
// VM of a primary address. Most faults need none: the servers show them.
func faultElements(primary netip.Addr, s Source, f Fault) []string {
	verdict, ok := map[Fault]string{BlackHole: "drop", Refused: "goto refuse"}[f]
	if !ok {
		return nil
	}
	return []string{fmt.Sprintf("faults { %s . %s : %s }", primary, s.addr(), verdict)}
}

// answer sends a document as the fault has it.
func answer(w http.ResponseWriter, f Fault, contentType, document, empty string) {
	w.Header().Set("Content-Type", contentType)
	switch f {
	case Status500:
		http.Error(w, "Internal Server Error", http.StatusInternalServerError)
		return
	case Status401:
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	case Throttled:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "Too Many Requests", http.StatusTooManyRequests)
		return
	case HTML:
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		document = "<!DOCTYPE html>\n<html><head><title>Log in</title></head><body><form>Log in to go on<br></form></body></html>\n"
	case Truncated:
		document = document[:len(document)/2]
	case Huge:
		first := strings.IndexAny(document, ">{") + 1
		document = document[:first] + strings.Repeat(" ", 10<<20) + document[first:]
	case Empty:
		document = empty
	case Slow:
		time.Sleep(1500 * time.Millisecond)
	case Chunked:
		half := len(document) / 2
		fmt.Fprint(w, document[:half])
		http.NewResponseController(w).Flush()
		fmt.Fprint(w, document[half:])
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(document)))
	fmt.Fprint(w, document)
}
