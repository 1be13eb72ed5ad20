// Package session is one connected cluster: the process that the daemon starts
// as the calling user. It reads the kubeconfig, runs the agent in the cluster,
// carries encrypted packets between the TUN device it was handed and the agent,
// and answers names. It holds no privilege: what it needs of the machine it asks
// of the daemon over package link.
//
// The way of a connection: session.connect walks the steps once, then five
// loops keep it: carrierLoop (the stream to the agent), doubtLoop (a changed
// network, a sleep), rangesLoop (what is routed), networkLoop (what the machine was told) and statusLoop (what the
// user is told). A process that finds a Network in its Start resumes instead:
// TUN and routes are still there, only the tunnel is made anew.
package session
