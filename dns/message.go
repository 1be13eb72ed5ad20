package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/dns"
)

const (
	headerLen = 12    // octets, RFC 1035, 4.1.1
	maxUDP    = 65507 // what one UDP datagram over IPv4 can carry
	flagQR    = 0x80  // of the header's third octet
	flagTC    = 0x02  // of the header's third octet
)

// query is one question as it came in. Its raw form is what is passed on.
type query struct {
	raw      []byte
	question dns.Question
	name     string // of the question, in lower case without the final dot
	end      int    // of the question section in raw
	opcode   int
	tcp      bool
	size     int  // of the largest answer that the asker takes, octets
	edns     bool // the asker sent an OPT record
	dnssec   bool // with the DO bit
}

// errNotQuery is returned for messages that must not be answered at all.
var errNotQuery = errors.New("not a query")

// parse reads a query. With an error other than errNotQuery, the query can
// still be answered with FORMERR.
func parse(raw []byte, tcp bool) (query, error) {
	q := query{raw: raw, end: headerLen, tcp: tcp, size: dns.MinMsgSize}
	if tcp {
		q.size = dns.MaxMsgSize
	}
	if len(raw) < headerLen || raw[2]&flagQR != 0 {
		return q, errNotQuery // an answer to an answer would be a loop
	}
	q.opcode = int(raw[2]>>3) & 0xf
	if n := binary.BigEndian.Uint16(raw[4:]); n != 1 {
		return q, fmt.Errorf("message has %d questions", n)
	}
	name, off, err := dns.UnpackDomainName(raw, headerLen)
	if err != nil {
		return q, fmt.Errorf("reading question: %w", err)
	}
	if off+4 > len(raw) {
		return q, errors.New("question is cut off")
	}
	q.question = dns.Question{
		Name:   name,
		Qtype:  binary.BigEndian.Uint16(raw[off:]),
		Qclass: binary.BigEndian.Uint16(raw[off+2:]),
	}
	q.name, q.end = normal(name), off+4
	var m dns.Msg
	if m.Unpack(raw) != nil {
		return q, nil // the rest is for the server to judge; without EDNS for us
	}
	if opt := m.IsEdns0(); opt != nil {
		q.edns, q.dnssec = true, opt.Do()
		if !tcp {
			q.size = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDP) // RFC 6891, 6.2.3
		}
	}
	return q, nil
}

// reply makes an answer without records. why goes along as an extended error
// (RFC 8914) if the asker speaks EDNS, as resolvers show and log it.
func (q query) reply(rcode int, why string) []byte {
	b := make([]byte, q.end, q.end+64)
	copy(b, q.raw[:q.end])
	b[2] = b[2]&^(flagTC|0x04) | flagQR // opcode and RD stay, AA and TC do not
	b[3] = 0x80 | byte(rcode&0xf)       // RA
	binary.BigEndian.PutUint16(b[4:], 1)
	if q.end == headerLen {
		binary.BigEndian.PutUint16(b[4:], 0) // the question was not readable
	}
	clear(b[6:headerLen])
	if q.edns {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(maxRead)
		opt.SetDo(q.dnssec)
		if why != "" {
			opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeNoReachableAuthority, ExtraText: why})
		}
		record := make([]byte, dns.Len(opt))
		if n, err := dns.PackRR(opt, record, 0, nil, false); err == nil {
			b = append(b, record[:n]...)
			binary.BigEndian.PutUint16(b[10:], 1)
		}
	}
	return b
}

// rename makes the query for another name; everything after the name stays as
// it is. Queries carry no compression pointers but to the question's name, at
// the same place still.
func (q query) rename(full string) ([]byte, error) {
	b := make([]byte, headerLen+255+len(q.raw)-q.end+4)
	copy(b, q.raw[:headerLen])
	off, err := dns.PackDomainName(full+".", b, headerLen, nil, false)
	if err != nil {
		return nil, fmt.Errorf("writing name %s: %w", full, err)
	}
	return append(b[:off], q.raw[q.end-4:]...), nil
}

// restore turns the answer for full into one for the name that was asked: the
// question is the asker's own, letter by letter, and so are the owners of the
// records that answer it. Targets (SRV, CNAME, PTR) keep their full names.
func (q query) restore(answer []byte, full string) ([]byte, error) {
	var m dns.Msg
	if err := m.Unpack(answer); err != nil {
		return nil, fmt.Errorf("reading answer for %s: %w", full, err)
	}
	m.Question = []dns.Question{q.question}
	full += "."
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if h := rr.Header(); strings.EqualFold(h.Name, full) {
				h.Name = q.question.Name
			}
		}
	}
	// A negative answer is cached only if its SOA's owner is above the name
	// (RFC 2308, 5), which the cluster's zone is not for a short form: the
	// name's top label stands in, or the root.
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok && !dns.IsSubDomain(soa.Hdr.Name, q.question.Name) {
			labels := dns.Split(q.question.Name)
			soa.Hdr.Name = "."
			if len(labels) > 1 {
				soa.Hdr.Name = q.question.Name[labels[len(labels)-1]:]
			}
		}
	}
	m.Compress = true
	b, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("writing answer for %s: %w", q.name, err)
	}
	return b, nil
}

// fit cuts an answer to what the asker takes, with TC set.
func (q query) fit(answer []byte) []byte {
	if len(answer) <= q.size {
		return answer
	}
	var m dns.Msg
	if m.Unpack(answer) == nil {
		m.Truncate(q.size)
		if b, err := m.Pack(); err == nil && len(b) <= q.size {
			return b
		}
	}
	b := q.reply(int(answer[3]&0xf), "")
	b[2] |= flagTC
	return b
}

// answers tells whether b is an answer to the question message asked: same id,
// same question. Servers that cannot read a question leave it out.
func answers(b, asked []byte) bool {
	if len(b) < headerLen || b[2]&flagQR == 0 || b[0] != asked[0] || b[1] != asked[1] {
		return false
	}
	if binary.BigEndian.Uint16(b[4:]) == 0 {
		return b[3]&0xf != 0
	}
	end := questionEnd(asked)
	if end > len(b) {
		return false
	}
	for i := headerLen; i < end; i++ {
		if lower(b[i]) != lower(asked[i]) {
			return false
		}
	}
	return true
}

// questionEnd is the length of header and question of a query that parse has
// accepted, or of one that rename made of it.
func questionEnd(asked []byte) int {
	_, off, err := dns.UnpackDomainName(asked, headerLen)
	if err != nil || off+4 > len(asked) {
		return headerLen
	}
	return off + 4
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}
