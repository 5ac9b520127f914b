//! Gateways that speak only `macula`: they take each message on a stream of its own. Callers may name them as relays of nodes,
//! and then they get the messages for those.

use std::net::SocketAddr;

use super::network::{Body, HostId, Packet, SECOND};
use super::node::WRONG_NODE;
use super::quic::{Carrier, ConnId, Item, KeyId, Notice, Serves, Timeouts};
use super::world::{World, trace};
use crate::types::Dialect;

const PORT: u16 = 9443;

pub(super) struct Gateway {
    pub(super) host: HostId,
    pub(super) key: KeyId,
    /// The number of the name that stands for its address, followed by those of nodes that only it leads to.
    pub(super) name: usize,
    behind: usize,
    streams: u32,
}

impl Gateway {
    pub(super) fn serves(&self) -> Serves {
        let Self { key, streams, .. } = *self;
        Serves { key, timeouts: Timeouts { keep_alive: 0, idle: 60 * SECOND }, dialect: Dialect::Macula, streams }
    }

    /// The names of nodes that only it leads to.
    pub(super) fn behind(&self) -> std::ops::Range<usize> {
        self.name + 1..self.name + 1 + self.behind
    }
}

impl World {
    /// `streams`: how many it allows at once.
    pub(super) fn add_gateway(&mut self, behind: usize, streams: u32) -> usize {
        let (gateway, name) = (self.gateways.len(), self.names.len());
        let (ip, key) = (self.public_ip(), self.new_key());
        let host = self.add_host(super::network::Is::Gateway(gateway), super::network::INTERNET, ip);
        // It is reached as relays are.
        self.relay_ips.insert(ip);
        for n in 0..=behind {
            self.names.push(crate::types::NodeId::new(format!("gateway {gateway}, {n}").as_bytes()).unwrap());
        }
        self.gateways.push(Gateway { host, key, name, behind, streams });
        gateway
    }

    pub(super) fn gateway_address(&self, gateway: usize) -> SocketAddr {
        SocketAddr::new(self.hosts[self.gateways[gateway].host].ip, PORT)
    }

    /// The gateway that a name leads to, and no node.
    pub(super) fn gateway_of(&self, name: usize) -> Option<usize> {
        self.gateways.iter().position(|gateway| gateway.name == name || gateway.behind().contains(&name))
    }

    /// It is back at once and knows of nothing.
    pub(super) fn restart_gateway(&mut self, gateway: usize) {
        self.drop_conns_of(self.gateways[gateway].host);
        trace!(self, "gateway {gateway} restarts");
    }

    pub(super) fn at_gateway(&mut self, gateway: usize, packet: Packet) {
        let Packet { from, to, body } = packet;
        let host = self.gateways[gateway].host;
        if let (Body::Quic(packet), PORT) = (body, to.port()) {
            self.quic_packet(host, Carrier::Udp { port: PORT, to: from }, packet);
        }
    }

    pub(super) fn gateway_notice(&mut self, gateway: usize, id: ConnId, notice: &Notice) {
        match notice {
            Notice::Item(_, Item::Whole(message)) => {
                self.give_credit(id);
                self.delivered_to_gateway(gateway, *message);
            }
            Notice::Item(stream, Item::Request(requested)) => {
                self.give_credit(id);
                self.request_arrived(self.nodes.len() + gateway, 0, requested.number);
                self.write(id, *stream, Item::Reply);
            }
            // It makes nothing of anything else.
            Notice::Item(stream, _) => {
                self.stop_stream(id, *stream, WRONG_NODE);
                self.reset_stream(id, *stream, WRONG_NODE);
            }
            _ => {}
        }
    }
}
