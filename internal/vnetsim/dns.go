// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/binary"
	"net"
	"strings"
)

// InternetName is the only name that the VNet's DNS knows: InternetAddr's.
const InternetName = "internet.test"

// serveDNS answers until the connection is closed. Every name but InternetName
// does not exist, which spares those who ask the wait for a time-out.
func serveDNS(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if reply := dnsReply(buf[:n]); reply != nil {
			conn.WriteTo(reply, from)
		}
	}
}

// dnsReply answers the one question of an RFC 1035 query, nil if it is none.
func dnsReply(query []byte) []byte {
	const header, response, nxdomain, classIN, typeA = 12, 0x8180, 3, 1, 1
	if len(query) < header || query[2]&0x80 != 0 || binary.BigEndian.Uint16(query[4:]) != 1 {
		return nil
	}
	var labels []string
	end := header
	for {
		if end >= len(query) {
			return nil
		}
		size := int(query[end])
		end++
		if size == 0 {
			break
		}
		if size > 63 || end+size > len(query) {
			return nil
		}
		labels = append(labels, string(query[end:end+size]))
		end += size
	}
	if end += 4; end > len(query) {
		return nil
	}
	known := strings.EqualFold(strings.Join(labels, "."), InternetName)
	reply := append([]byte(nil), query[:end]...)
	flags := uint16(response)
	if !known {
		flags |= nxdomain
	}
	binary.BigEndian.PutUint16(reply[2:], flags)
	answers := uint16(0)
	if known && binary.BigEndian.Uint32(query[end-4:]) == typeA<<16|classIN {
		answers = 1
		reply = append(reply, 0xc0, header, 0, typeA, 0, classIN, 0, 0, 0, 60, 0, 4)
		reply = append(reply, InternetAddr.AsSlice()...)
	}
	binary.BigEndian.PutUint16(reply[6:], answers)
	copy(reply[8:], []byte{0, 0, 0, 0}) // no authority; the query's EDNS record is not repeated
	return reply
}
